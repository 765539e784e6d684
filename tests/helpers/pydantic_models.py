"""Models as people write them for structured output, of every kind that pydantic has its own words for."""

from __future__ import annotations

import datetime
import ipaddress
from decimal import Decimal
from enum import Enum, IntEnum
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar, Union
from uuid import UUID

from pydantic import (
    AnyUrl,
    Base64Str,
    BaseModel,
    ConfigDict,
    Field,
    FilePath,
    HttpUrl,
    JsonValue,
    RootModel,
    SecretStr,
    StringConstraints,
    create_model,
)
from typing_extensions import TypedDict

T = TypeVar("T")


class Colour(Enum):
    RED = "red"
    BLUE = "blau"


class Level(IntEnum):
    LOW = 1
    HIGH = 2


class Person(BaseModel):
    """A person."""

    name: str
    age: int = Field(ge=0, le=130)


class Address(BaseModel):
    street: str
    city: str = "Bern"
    zip_code: str | None = None


class Customer(Person):
    address: Address
    addresses: list[Address] = []
    tags: set[str] = set()


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")
    a: int


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    a: int


class Typed(BaseModel):
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, int]
    a: int


class Invoice(BaseModel):
    total: Decimal
    net: Annotated[Decimal, Field(max_digits=8, decimal_places=2, gt=0)]
    lines: list[Decimal]


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"] = "dog"
    name: str


class Parrot(BaseModel):
    kind: Literal["parrot", "bird"]
    words: list[str]


class Zoo(BaseModel):
    animal: Annotated[Cat | Dog | Parrot, Field(discriminator="kind")]
    others: list[Annotated[Cat | Dog, Field(discriminator="kind")]] = []


class Undiscriminated(BaseModel):
    animal: Cat | Dog | None


class Nested(BaseModel):
    pet: Annotated[Annotated[Cat | Dog, Field(discriminator="kind")] | Parrot, Field(discriminator="kind")]


class Scores(BaseModel):
    by_subject: dict[Literal["maths", "art"], float]
    by_colour: dict[Colour, int]
    by_id: dict[UUID, bool]
    by_day: dict[datetime.date, str]
    by_short: dict[Annotated[str, StringConstraints(min_length=2, max_length=4)], int]
    by_pattern: dict[Annotated[str, StringConstraints(pattern="^[a-z]{2}$")], int]
    by_number: dict[int, str] = {}


class Sets(BaseModel):
    colours: set[Colour]
    flags: frozenset[bool]
    levels: set[Level] = Field(min_length=1)
    letters: set[Literal["a", "b", "c", "d", "e", "f"]] = Field(max_length=3)


class Times(BaseModel):
    at: datetime.datetime
    day: datetime.date
    time: datetime.time
    lasts: datetime.timedelta


class Formats(BaseModel):
    id: UUID
    path: Path
    url: HttpUrl
    any_url: AnyUrl
    secret: SecretStr
    encoded: Base64Str
    data: bytes
    v4: ipaddress.IPv4Address
    v6: ipaddress.IPv6Address
    net: ipaddress.IPv4Network


class Node(BaseModel):
    value: int
    children: list[Node] = []


class LinkedList(BaseModel):
    head: int
    tail: LinkedList | None = None


class Expression(BaseModel):
    operator: Literal["+", "-"]
    left: Expression | int
    right: Expression | int


class Tuples(BaseModel):
    pair: tuple[int, str]
    many: tuple[int, ...]
    nested: tuple[tuple[bool, bool], Colour]


class Point(NamedTuple):
    x: int
    y: int


class Line(BaseModel):
    start: Point
    end: Point


class Movie(TypedDict, total=False):
    name: str
    year: int


class Library(BaseModel):
    movies: list[Movie]


class Page(BaseModel, Generic[T]):
    items: list[T]
    next: str | None


class Aliases(BaseModel):
    first: int = Field(alias="first name")
    street: str = Field(alias="straße")
    dollar: int = Field(alias="$ref")
    slash: int = Field(alias="a/b~c")


class 地址(BaseModel):  # noqa: N801
    城市: str


class Chinese(BaseModel):
    住址: 地址
    更多: list[地址]


class Numbers(BaseModel):
    even: int = Field(multiple_of=2, gt=0, lt=100)
    share: float = Field(ge=0, le=1)
    cents: Decimal = Field(ge=0, le=10)
    level: Level


class Texts(BaseModel):
    short: str = Field(min_length=1, max_length=5)
    code: str = Field(pattern=r"^[A-Z]{3}-\d{2}$")
    both: Annotated[str, StringConstraints(pattern="^a", max_length=3)]
    maybe: Annotated[str, StringConstraints(min_length=2)] | None


class Lists(BaseModel):
    few: list[int] = Field(min_length=1, max_length=3)
    matrix: list[list[float]]
    mixed: list[int | str | None]


class Constants(BaseModel):
    version: Literal[1] = 1
    mixed: Literal["a", 2, True, None]
    colour: Colour = Colour.RED


class Anything(BaseModel):
    value: Any
    table: dict[str, Any]
    json_value: JsonValue = None


class Empty(BaseModel):
    pass


class Holder(BaseModel):
    empty: Empty
    maybe: Empty | None = None


class Described(BaseModel):
    """With everything that says nothing."""

    old: int = Field(deprecated=True, examples=[1, 2], description="old", title="Old")
    new: Person = Field(description="a reference with words beside it")


class Names(RootModel[list[str]]):
    pass


class Table(RootModel[dict[str, Person]]):
    pass


class Shapes(BaseModel):
    """Two models of one name, which pydantic tells apart."""

    a: Page[int]
    b: Page[Person]


class Deep(BaseModel):
    a: dict[str, list[dict[str, Person | None]]]


class Files(BaseModel):
    paths: list[Path]
    file: FilePath | None = None


Large = create_model("Large", **{f"field_{i}": (Address if i % 3 else str | None, ...) for i in range(120)})  # type: ignore[call-overload]
Optionals = create_model("Optionals", **{f"field_{i}": (int | None, None) for i in range(60)})  # type: ignore[call-overload]
Choice = create_model("Choice", value=(Union[int, float, str, bool], ...))  # noqa: UP007

MODELS: list[type[BaseModel]] = [
    *(Person, Address, Customer, Strict, Open, Typed, Invoice, Cat, Dog, Parrot, Zoo, Undiscriminated, Nested, Scores),
    *(Sets, Times, Formats, Node, LinkedList, Expression, Tuples, Line, Library, Page[Person], Aliases, 地址, Chinese),
    *(Numbers, Texts, Lists, Constants, Anything, Empty, Holder, Described, Names, Table, Shapes, Deep, Files, Large),
    *(Optionals, Choice),
]
