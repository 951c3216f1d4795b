"""Ready problems, imported as `bilevel.problems`."""

if __name__ != "bilevel.problems":
    raise ImportError("import this package as bilevel.problems, so that its classes exist once")
