"""Makes the repository root importable in tests, wherever pytest is started from."""
