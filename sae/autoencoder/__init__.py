"""The sparse autoencoder, its architectures and its training losses."""
