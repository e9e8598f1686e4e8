// What the three parts of the stand-in share: counting calls.
#pragma once
#include <string>

#define EXPORT extern "C" __attribute__((visibility("default")))

// Counts one call, by its group and name. `amount` is bytes, FLOPs or blocks; `stream` and `event` are for the timeline.
void count(
    const char* group, const std::string& name, double amount = 0, const void* stream = nullptr,
    const void* event = nullptr);
