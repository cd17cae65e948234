"""Actions that wait for the import of another library."""

import importlib
import importlib.util
import sys

import pytest

from apt_kernels.wrapping import when_loaded


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The name of a package that nothing has imported; what it leaves behind is removed."""
    name = "a_library_for_this_test"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("import sys\nif 'fail' in sys.modules: raise ImportError('broken')\n")
    (tmp_path / name / "part.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield name
    for module in [each for each in sys.modules if each.partition(".")[0] == name]:
        del sys.modules[module]


def test_a_question_whether_a_library_is_installed_does_not_use_up_the_action(package):
    called, finders = [], len(sys.meta_path)

    def action():
        called.append(package in sys.modules)

    for _ in range(2):
        when_loaded(package, action)
    assert importlib.util.find_spec(package) is not None
    assert not called
    assert len(sys.meta_path) == finders + 1
    importlib.import_module(package)
    assert called == [True]
    assert len(sys.meta_path) == finders
    when_loaded(package, action)
    assert called == [True, True]


def test_two_actions_for_one_library(package):
    called = []
    when_loaded(package, lambda: called.append("first"))
    when_loaded(package, lambda: called.append("second"))
    assert importlib.util.find_spec(package) is not None
    importlib.import_module(package)
    assert sorted(called) == ["first", "second"]


def test_a_part_of_a_library(package):
    called = []
    when_loaded(f"{package}.part", lambda: called.append(True))
    importlib.import_module(package)
    assert importlib.util.find_spec(f"{package}.part") is not None
    assert not called
    importlib.import_module(f"{package}.part")
    assert called == [True]


def test_an_import_that_failed_is_waited_for_again(package, monkeypatch):
    called = []
    when_loaded(package, lambda: called.append(True))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "fail", sys)
        with pytest.raises(ImportError, match="broken"):
            importlib.import_module(package)
    assert not called
    importlib.import_module(package)
    assert called == [True]


def test_an_action_that_fails_is_a_warning_and_the_library_is_there(package):
    def action():
        raise AttributeError("no attribute")

    when_loaded(package, action)
    with pytest.warns(UserWarning, match=f"apt_kernels cannot work beside this {package}: no attribute"):
        importlib.import_module(package)


def test_what_is_not_installed_is_not_found(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    when_loaded("no_library_of_this_name", lambda: None)
    assert importlib.util.find_spec("no_library_of_this_name") is None
