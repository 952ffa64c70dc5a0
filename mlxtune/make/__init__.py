"""Making data: rows to train on, by a model, with a word on where each comes from.

To add a maker:
1. write it as a function from answers to rows: it asks a `folder.Making` for answers, keeps rows, rejects what is no
   good with a code of `reasons.REASONS`, and finishes. Nothing but the answers may decide what it asks next;
2. give it a command in a file of its own, `cli/make_NAME.py`, with `cli.make.making_options`, and put that into MAKERS;
3. its tests need no model: `tests/made.py` has an engine that answers what it is told to.
"""
