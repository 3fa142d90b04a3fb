"""One module for each tab, with a ``build(context, page)`` that makes and wires its components."""
