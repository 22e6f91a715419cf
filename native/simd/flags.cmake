# Flags per instruction set, one file each. No contraction anywhere: where a multiply-add is fused is written in the source.
set(FLASHLM_KERNEL_FLAGS "-O3;-ffp-contract=off;-fvisibility=hidden")
if(FLASHLM_SANITIZE)
  string(REPLACE "-O3" "-O1" FLASHLM_KERNEL_FLAGS "${FLASHLM_KERNEL_FLAGS}")  # compiles in half the time
endif()
foreach(FOLDER rows gates)
  get_filename_component(KERNELS ${CMAKE_CURRENT_LIST_DIR}/../${FOLDER} ABSOLUTE)
  file(GLOB KERNEL_SOURCES ${KERNELS}/*.cpp)
  set_source_files_properties(${KERNEL_SOURCES} PROPERTIES COMPILE_OPTIONS "${FLASHLM_KERNEL_FLAGS}")
  # gcc warns about its own AVX-512 intrinsics, whose "undefined" vectors are read on purpose (its bug 105593, in 12 and 13): hence
  # no -W*uninitialized there. The same source goes through avx2.cpp and generic.cpp, where the warnings stay on.
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
    set_source_files_properties(${KERNELS}/avx2.cpp PROPERTIES
      COMPILE_OPTIONS "${FLASHLM_KERNEL_FLAGS};-mavx2;-mfma;-mf16c")
    set_source_files_properties(${KERNELS}/avx512.cpp PROPERTIES
      COMPILE_OPTIONS "${FLASHLM_KERNEL_FLAGS};-mavx512f;-mavx512bw;-mavx512vl;-mfma;-mf16c;-Wno-uninitialized;-Wno-maybe-uninitialized")
    set_source_files_properties(${KERNELS}/vnni.cpp PROPERTIES
      COMPILE_OPTIONS "${FLASHLM_KERNEL_FLAGS};-mavx2;-mfma;-mf16c;-mavx512f;-mavx512bw;-mavx512vl;-mavx512vnni;-mprefer-vector-width=256")
    set_source_files_properties(${KERNELS}/avx512_vbmi.cpp PROPERTIES
      COMPILE_OPTIONS "${FLASHLM_KERNEL_FLAGS};-mavx512f;-mavx512bw;-mavx512vl;-mavx512vnni;-mavx512vbmi;-mfma;-mf16c;-Wno-uninitialized;-Wno-maybe-uninitialized")
    set_source_files_properties(${KERNELS}/avx512_vnni.cpp PROPERTIES
      COMPILE_OPTIONS "${FLASHLM_KERNEL_FLAGS};-mavx512f;-mavx512bw;-mavx512vl;-mavx512vnni;-mfma;-mf16c;-Wno-uninitialized;-Wno-maybe-uninitialized")
  endif()
endforeach()
