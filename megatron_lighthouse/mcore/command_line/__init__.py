"""What a command line asks for: arguments, settings, and what is refused."""
