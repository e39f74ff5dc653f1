"""Loading and saving, chat templates, and log-probs of token trees: the room that knows `transformers`."""

import os

# torch and oneDNN keep what they prepared for the last 1,024 shapes of a product each, a quarter of a megabyte apiece,
# and trees have ever new numbers of tokens: a training came to hold half a gigabyte of it, in pieces that nothing else
# fits between. So many hold more than one micro-batch asks for. Both are read at the first product.
for _name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
    os.environ.setdefault(_name, "64")
