"""How a feature is stored: as computed, as int8, queries and keys cut to fewer components."""
