"""What trainer and servers both must agree on about a weight update: manifest, files, broadcast."""
