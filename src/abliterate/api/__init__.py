"""The Python face: a model with verbs, the verbs of the command line as functions, results that show themselves.

options    the settings as keyword arguments, for editors and type checkers (generated)
settings   keyword arguments as settings by concern
progress   where progress is shown
show       results as tables, in text and in notebooks
results    what `find` and `search` give
plots      figures of them
model      a model with verbs
calls      the verbs as functions
"""
