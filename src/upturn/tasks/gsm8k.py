r"""Grade-school word problems with a number as the answer (Cobbe et al., 2021, arXiv:2110.14168).

The last stated answer counts, looked for in this order: '#### n', \boxed{n}, 'the answer is n', the last number.
Numbers are equal as decimals: 1,000 = $1000.00 = 1000. There is no partial credit.

Data: `question`, and `answer` that ends in '#### n', as in the hub's openai/gsm8k.
"""

from __future__ import annotations

import re
from decimal import Context, Decimal

from pydantic import Field

from upturn._model import Strict
from upturn.tasks._base import Split, Task
from upturn.tasks._files import TEST_SHARE, Columns, Table
from upturn.tasks.math import last_boxed
from upturn.types import Prompt, Score

_NUMBER = r"(?:(?<![\w)])[-−])?\$?[-−]?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)?(?:(?<=[0-9])|\.(?=[0-9]))"
