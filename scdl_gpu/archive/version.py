"""The mark and the schema version that a header begins with.

Knows what is current, not what a version permits: the header decides that. Versions compare equal or not and
have no order, as in the reference; whoever needs one compares `major`, then `minor`.
"""

SCDL_MAGIC_NUMBER = b"SCDL"


class Version:
    """Three numbers, mutable as in the reference."""

    def __init__(self, major: int = 0, minor: int = 0, point: int = 0) -> None:
        self.major = major
        self.minor = minor
        self.point = point


class SCDLVersion(Version):
    """Version of the schema of an archive; equal by value, unhashable because mutable."""

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.point}"

    def __repr__(self) -> str:
        return f"SCDLVersion(major={self.major}, minor={self.minor}, point={self.point})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Version):
            return NotImplemented
        return (self.major, self.minor, self.point) == (other.major, other.minor, other.point)


class CurrentSCDLVersion(SCDLVersion):
    """The schema version that raw archives are written with: 0.1.0."""

    def __init__(self) -> None:
        super().__init__(0, 1, 0)
