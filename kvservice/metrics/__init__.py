"""What Prometheus sees: a table of metrics, the collector that reads it, and the server that answers by HTTP."""
