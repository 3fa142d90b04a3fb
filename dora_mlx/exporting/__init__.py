"""From a trained model to files that other programs load.

``merge`` gives the weights a block at a time; ``formats`` lists what can be written, and each has
a ``Writer`` that refuses, measures, writes and reads back; ``job`` puts the export in place when
what was read back is the model that was exported, and ``judgement`` says what is left of the
training in it.
"""
