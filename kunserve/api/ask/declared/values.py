"""What values of fields may be, under the names that the bodies use."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta

from kunserve.api.ask.declared.fields import Kept, Refused
from kunserve.api.wire.fields import INT64_MAX

MAX_N = 128
MAX_STOPS = 16
MAX_BIASES = 1 << 18
MAX_LOGPROBS = 20
MAX_BAD_WORDS = 64
MAX_BAD_WORD_CHARS = 256
MAX_USER_CHARS = 256

Count = Annotated[int, Meta(ge=0, le=INT64_MAX)]
Choices = Annotated[int, Meta(ge=1, le=MAX_N)]
AtLeastOne = Annotated[int, Meta(ge=1, le=INT64_MAX)]
MinusOneOrMore = Annotated[int, Meta(ge=-1, le=INT64_MAX)]
# msgspec knows no bound beyond int64; a larger integer than this comes out of the JSON reader as a float.
Seed = Annotated[int, Meta(ge=-INT64_MAX - 1, extra_json_schema={"maximum": (1 << 64) - 1})]
Priority = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
Logprobs = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
Positive = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
TokenId = Annotated[int, Meta(ge=0, le=INT64_MAX, description="a token id")]
# In Python's regexes `$` is before a last line break as well.
TokenKey = Annotated[str, Meta(pattern=r"^[0-9]{1,10}$(?!\n)", description="a token id")]
Bias = Annotated[float, Meta(ge=-100, le=100)]
# No vocabulary has more tokens, and an object of more takes long to make and to forget.
AllBiases = Annotated[dict[TokenKey, Bias | None], Meta(max_length=MAX_BIASES)]
Biases = Annotated[dict[str, float | None] | None, Kept(AllBiases)]
NonEmpty = Annotated[str, Meta(min_length=1)]
Stop = NonEmpty | Annotated[list[NonEmpty], Meta(max_length=MAX_STOPS)]
BadWord = Annotated[str, Meta(min_length=1, max_length=MAX_BAD_WORD_CHARS)]
BadWords = Annotated[list[BadWord], Meta(max_length=MAX_BAD_WORDS)]
Salt = Annotated[str, Meta(max_length=MAX_USER_CHARS)]
Object = dict[str, Any]
JsonSchema = Object | bool
Unsupported = Annotated[Any, Refused()]
