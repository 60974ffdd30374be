"""Pieces of the modelling file that an export carries: inference alone, torch and transformers alone.

``assemble`` pastes the pieces that one model needs into one file. Each piece is a module of its own so that it is
linted, typed and tested like any other; its imports of other pieces are left out in the file.
"""
