// The extension module dashinfer_vlm.kernels._cpu.
#include <nanobind/stl/vector.h>

#include <cerrno>
#include <system_error>

#include "arena.h"
#include "bindings.h"

namespace {

void set_memory_nodes(const std::vector<int>& nodes) {
  for (int node : nodes)
    if (node < 0) throw nanobind::value_error(("nodes: " + std::to_string(node) + " is no memory node").c_str());
  try {
    di::set_memory_nodes(nodes);
  } catch (const std::system_error& error) {
    errno = error.code().value();
    PyErr_SetFromErrno(PyExc_OSError);
    nanobind::raise_python_error();
  }
}

void set_cores(const std::vector<int>& cores) {
  for (int core : cores)
    if (core < 0) throw nanobind::value_error(("cores: " + std::to_string(core) + " is no core").c_str());
  const di::Running running;
  di::set_cores(cores);
}

}  // namespace

NB_MODULE(_cpu, m) {
  nanobind::set_leak_warnings(false);  // packed weights may live as long as the interpreter
  m.def("levels", di::runnable_levels);
  m.def("isa", [] { return std::string(di::kernels().name); });
  m.def("multiplies_bfloat16", [] { return di::kernels().multiplies_bfloat16; });
  m.def("set_isa", di::set_level, nanobind::arg("name"));
  m.def("num_threads", di::num_threads);
  m.def(
      "set_num_threads",
      [](int n) {
        const di::Running running;
        di::set_num_threads(n);
      },
      nanobind::arg("n"));
  m.def("set_cores", set_cores, nanobind::arg("cores"));
  m.def("set_memory_nodes", set_memory_nodes, nanobind::arg("nodes"));
  di::bind_linear(m);
  di::bind_attention(m);
  di::bind_cache(m);
  di::bind_norm(m);
  di::bind_layer(m);
  di::bind_experts(m);
  di::bind_sample(m);
  di::bind_delta_net(m);
}
