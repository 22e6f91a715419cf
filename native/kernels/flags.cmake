# Flags per instruction set, one file each. No contraction anywhere: where a multiply-add is fused is written in the source.
set(FLASHLM_KERNEL_FLAGS "-O3;-ffp-contract=off;-fvisibility=hidden")
file(GLOB FLASHLM_KERNEL_SOURCES ${CMAKE_CURRENT_LIST_DIR}/*.cpp)
set_source_files_properties(${FLASHLM_KERNEL_SOURCES} PROPERTIES COMPILE_OPTIONS "${FLASHLM_KERNEL_FLAGS}")
# gcc 12 warns about its own AVX-512 intrinsics (its bug 105593): hence -Wno-maybe-uninitialized.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/avx2.cpp PROPERTIES
    COMPILE_OPTIONS "${FLASHLM_KERNEL_FLAGS};-mavx2;-mfma;-mf16c")
  set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/avx512.cpp PROPERTIES
    COMPILE_OPTIONS "${FLASHLM_KERNEL_FLAGS};-mavx512f;-mavx512bw;-mavx512vl;-mfma;-mf16c;-Wno-maybe-uninitialized")
endif()
