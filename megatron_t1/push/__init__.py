"""New weights from the trainer's ranks into every server, proved (sync), by one of three ways (transports)."""
