"""titan_peer: train language models built of PEER (millions of tiny experts) and multi-head latent attention."""

__version__ = "0.1.0"
