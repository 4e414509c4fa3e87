"""Wire to domain and back, and nothing else: no rule of the store is in here."""
