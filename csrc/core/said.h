// Of a C function that the library shows; all else in it is hidden.
#pragma once

#define KDFUSE_SAID __attribute__((visibility("default")))
