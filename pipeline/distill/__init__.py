"""Channel-idle copies of teachers, distilled from the tokens of a cache."""
