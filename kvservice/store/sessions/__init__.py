"""Sessions: their manifests, and the rules for changing them."""
