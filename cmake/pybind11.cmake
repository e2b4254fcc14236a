# Finds pybind11's headers: CAT_PYBIND11_INCLUDE. In the package pybind11 of the Python that is built for, else in its
# PyTorch, which carries them along (a help for building in place; `pip install` brings pybind11 itself).
# By `cmake -P` it only tells; so setup.py learns beforehand whether they are there.
if(NOT CAT_PYBIND11_INCLUDE)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c [[
import importlib.util, pathlib
for package in ("pybind11", "torch"):
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (pathlib.Path(folder) / "include" / "pybind11" / "pybind11.h").exists():
            raise SystemExit(print(pathlib.Path(folder) / "include"))
]]
    OUTPUT_VARIABLE CAT_PYBIND11_INCLUDE OUTPUT_STRIP_TRAILING_WHITESPACE)
endif()
if(NOT CAT_PYBIND11_INCLUDE)
  find_path(CAT_PYBIND11_SYSTEM pybind11/pybind11.h)
  if(CAT_PYBIND11_SYSTEM)
    set(CAT_PYBIND11_INCLUDE ${CAT_PYBIND11_SYSTEM})
  endif()
endif()
if(CAT_PYBIND11_INCLUDE)
  message(STATUS "pybind11: ${CAT_PYBIND11_INCLUDE}")
elseif(NOT CMAKE_SCRIPT_MODE_FILE)
  cat_fail("pybind11's headers were not found; install them with: ${Python_EXECUTABLE} -m pip install pybind11")
endif()
