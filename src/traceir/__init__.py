"""TraceIR: universal multimodal retrieval that thinks when a query needs it (an implementation of TRACE, arXiv 2603.02929)."""

__version__ = "0.1.0"
