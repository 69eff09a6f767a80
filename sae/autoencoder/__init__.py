"""The sparse autoencoder and its kin, their architectures and their training losses."""

from sae.autoencoder import architectures
from sae.autoencoder.crosscoder import Crosscoder
from sae.autoencoder.sae import CODERS
from sae.autoencoder.transcoder import Transcoder

CODERS |= {Transcoder.kind: Transcoder, Crosscoder.kind: Crosscoder}

__all__ = ["architectures"]
