"""Pages about runs that are done or under way, made from their folders alone."""
