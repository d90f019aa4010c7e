"""What capture makes of the models of other packages: ``python -m benchmarks.field``.

Each model is run twice on the same numbers: once under ``truth``, which knows nothing of attention_monitor, and once
under ``capture``; ``compare`` tells what became of each site. What is known of a model by reading its code stands
beside it in ``models/``. A package that is not installed is a row that says so.
"""
