"""TraceIR inside other projects' frameworks; each module needs the package it is named after."""
