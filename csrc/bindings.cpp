// cat_kernels._C: the C++ library for Python. Addresses are integers; shapes, dtypes and devices are checked in Python.

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "fbank/cpu.h"
#include "fbank/tables.h"
#ifdef CAT_WITH_CUDA
#include "fbank/cuda.h"
#endif

namespace py = pybind11;

namespace {

cat::Window window_named(const std::string& name) {
  if (name == "hanning") return cat::Window::hanning;
  if (name == "povey") return cat::Window::povey;
  if (name == "hamming") return cat::Window::hamming;
  throw std::invalid_argument("fbank: window='" + name + "'; expected 'hanning', 'povey' or 'hamming'");
}

cat::Dtype dtype_named(const std::string& name) {
  if (name == "float32") return cat::Dtype::float32;
  if (name == "float16") return cat::Dtype::float16;
  if (name == "bfloat16") return cat::Dtype::bfloat16;
  if (name == "int16") return cat::Dtype::int16;
  throw std::invalid_argument("fbank: dtype " + name + "; expected float32, float16, bfloat16 or int16");
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

cat::FbankCall make_call(uintptr_t waveform, const std::string& input, int64_t clips, int64_t samples, int64_t row_stride,
                         uintptr_t lengths, uintptr_t output, const std::string& dtype, int64_t frames,
                         double preemphasis, bool remove_dc, double scale, double mean, double factor) {
  return {pointer<const void>(waveform), dtype_named(input), clips, samples, row_stride,
          pointer<const int64_t>(lengths), pointer<void>(output), dtype_named(dtype), frames, float(preemphasis),
          remove_dc, float(scale), float(mean), float(factor)};
}

py::list instruction_sets() {
  py::list names;
  for (const char* const* name = cat::cpu_instruction_sets(); *name; ++name) names.append(*name);
  return names;
}

py::dict about() {
  py::dict found;
  found["version"] = CAT_VERSION;
  found["compiler"] = CAT_COMPILER;
  found["cuda"] = CAT_CUDA_VERSION;
  found["architectures"] = py::str(CAT_CUDA_ARCHITECTURES).attr("split")(",");
  if (!*CAT_CUDA_ARCHITECTURES) found["architectures"] = py::list();
  found["cpu"] = cat::cpu_instruction_set();
  found["cpus"] = instruction_sets();
  return found;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "The C++ and CUDA part of cat_kernels; cat_kernels.extension is the way to it.";
  module.def("about", &about, "What was built, by what, and the CPU instruction sets that can run here.");
  module.def("use_cpu_instruction_set", &cat::use_cpu_instruction_set, py::arg("name"), "For tests and benchmarks.");

  // Local to the module: pybind11 refuses a type that another copy of the package has entered in the same process.
  py::class_<cat::FbankCall>(module, "FbankCall", py::module_local(),
                             "One call: addresses, sizes and options (csrc/fbank/fbank.h).")
      .def(py::init(&make_call), py::kw_only(), py::arg("waveform"), py::arg("input"), py::arg("clips"),
           py::arg("samples"), py::arg("row_stride"), py::arg("lengths"), py::arg("output"), py::arg("dtype"),
           py::arg("frames"), py::arg("preemphasis"), py::arg("remove_dc"), py::arg("scale"), py::arg("mean"),
           py::arg("factor"));

  py::class_<cat::FbankTables>(module, "FbankTables", py::module_local(),
                               "Window, twiddle factors and mel weights of one setting.")
      .def(py::init([](int frame_length, int frame_shift, int fft_length, int num_mel_bins, double sample_rate,
                       double low_freq, double high_freq, const std::string& window) {
             return cat::fbank_tables({frame_length, frame_shift, fft_length, num_mel_bins}, sample_rate, low_freq,
                                      high_freq, window_named(window));
           }),
           py::kw_only(), py::arg("frame_length"), py::arg("frame_shift"), py::arg("fft_length"),
           py::arg("num_mel_bins"), py::arg("sample_rate"), py::arg("low_freq"), py::arg("high_freq"),
           py::arg("window"))
      .def("__bytes__", [](const cat::FbankTables& tables) {
        return py::bytes(reinterpret_cast<const char*>(tables.memory.data()), tables.memory.size());
      });

  module.def("fbank_cpu", &cat::fbank_cpu, py::arg("tables"), py::arg("call"), py::arg("threads"),
             py::call_guard<py::gil_scoped_release>());

#ifdef CAT_WITH_CUDA
  module.def("cuda_problem", &cat::cuda_problem, py::arg("device"), "Why no kernel can run there; empty where they can.");
  module.def(
      "fbank_cuda",
      [](const cat::FbankTables& tables, uintptr_t device_tables, const cat::FbankCall& call, int device,
         uintptr_t stream) {
        cat::fbank_cuda(tables, pointer<const void>(device_tables), call, device, pointer<void>(stream));
      },
      py::arg("tables"), py::arg("device_tables"), py::arg("call"), py::arg("device"), py::arg("stream"),
      py::call_guard<py::gil_scoped_release>());
#endif
}
