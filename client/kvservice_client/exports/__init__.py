"""Moving sessions and blocks between daemons through a file: its format, the export, and the import."""
