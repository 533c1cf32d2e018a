// Names put together by the preprocessor, for the files that are compiled once for each op.
#pragma once

#define KDFUSE_TEXT_(x) #x
#define KDFUSE_TEXT(x) KDFUSE_TEXT_(x)
#define KDFUSE_JOIN_(a, b) a##_##b
#define KDFUSE_JOIN(a, b) KDFUSE_JOIN_(a, b)
