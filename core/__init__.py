"""The lowest layer: bundle, technique contract, reversible edits, training, evaluation, datasets, errors, units."""
