"""The storage forms of a feature, as computed, as int8, or with queries and keys cut to fewer components."""
