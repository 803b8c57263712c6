"""Drop-ins for other libraries. Each module imports only the library that it serves."""
