"""One run: built, trained, saved, resumed."""
