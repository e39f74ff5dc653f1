"""Common, concrete English nouns for generated prompts."""

from __future__ import annotations

_NOUNS = """
apple arm baby ball basket bath beach bear bed bell bird boat book bottle bowl box boy branch bread brick
bridge brother bucket bus butter button cabin cake camera camp candle car carpet castle cat chair cheese
chicken child church circle city clock cloud coat coffee coin corn corner cow crowd cup curtain dance
daughter desk dinner doctor dog door dragon dress drum duck ear egg elephant engine eye family farm farmer
father feather fence field finger fire fish flag floor flower forest fork fox friend frog garden gate
ghost gift girl glass glove goat gold grandmother grass guitar hammer hand hat hill honey horse hospital
house ice island jacket jar kettle key king kitchen kite knife ladder lake lamp leaf lemon letter library
lion lunch map market meadow milk mirror money monkey moon morning mother mountain mouse music neighbor
nest night nose nurse ocean onion orange oven owl paint paper park path pencil phone piano picture pig
pillow pirate plane plate pocket pond potato prince puppy queen rabbit radio rain rainbow ribbon ring
river road robot rock roof room rope rose sand school sea seed sheep ship shirt shoe shop silver sister
sky smoke snake snow soap sock soldier song soup spider spoon spring star station stone storm story street
student sugar summer sun table tail teacher tent tiger tower town toy train treasure tree truck umbrella
uncle valley village violin wall water whale wheel wind window winter wizard wolf wood zoo
"""

WORDS = tuple(_NOUNS.split())
"""All of them, each once."""
