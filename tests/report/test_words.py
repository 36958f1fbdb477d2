from advmoe.report import words


def test_a_threat():
    assert words.of_threat({"norm": "linf", "eps": 8 / 255}) == "linf eps 8/255"
    assert words.of_threat({}) == "eps unknown"


def test_a_value_of_a_file_on_one_line():
    value = {"eps_used": 0.03125, "seeds": [0, 1], "name": None, "on": True, "inner": {"a": 2000}}
    assert words.flat(value) == "eps used 0.0312, seeds 0, 1, name \N{EN DASH}, on True, inner a 2,000"
