"""Common, concrete English words for generated prompts, each usable in a sentence as it is."""

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
_VERBS = """
ask bake borrow bring build buy carry catch chase choose clean climb cook count cross cry cut dig draw
dream drink drive drop eat explore fall feed fight fill find fix fly fold follow forget give grow help
hide hold hunt jump keep kick knock laugh learn leave lift listen look lose make meet move open pack pick
plant play pour pull push read remember rest ride run save sell send share shout sing sit sleep smell
smile speak stand steal swim take talk taste teach throw touch travel visit wait walk wash watch wear win
wish work write
"""
_ADJECTIVES = """
angry ancient bitter black blue brave bright broken brown busy calm careful cheap clever cold cool curious
dark deep dirty dry dusty early empty famous fast flat fresh friendly full funny gentle giant golden gray
green happy hard heavy high hot hungry kind large lazy little lonely long lost loud lucky modern narrow
new noisy old perfect pink polite poor proud purple quick quiet red rich round sad safe scared secret
sharp shiny short shy sick silent simple slow small smooth soft sour strange strong sweet tall thick thin
tiny tired ugly warm wet white wide wild wise wooden yellow young
"""

NOUNS, VERBS, ADJECTIVES = tuple(_NOUNS.split()), tuple(_VERBS.split()), tuple(_ADJECTIVES.split())

WORDS = NOUNS + VERBS + ADJECTIVES
"""All of them, each once."""
