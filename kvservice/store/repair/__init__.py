"""What `kvservice check` does to a store whose index is damaged or lost. No daemon runs meanwhile."""
