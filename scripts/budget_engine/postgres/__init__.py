"""PostgreSQL from outside: connections, the embedded server, and who holds what we wait for."""
