"""`repa softrepa …`, a method whose network is a frozen model of others."""
