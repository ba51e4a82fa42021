// Package imagetest has what proves a Device, and what sits on one, right:
//
//   - CrashDevice, an in-memory medium behind a page cache. It logs what is
//     done to it and enumerates the contents that a power cut could leave.
//   - FaultDevice, which makes chosen operations on any Device go wrong.
//   - Conformance, the suite that every Device passes.
//
// # What a power cut may leave
//
// Everything before the last successful Sync is there. Of the writes since,
// any subset of 512-byte sectors is there, in any order. A write that covers a
// sector in part has the page cache write the whole sector, as it is seen at
// that time; so for each sector the legal contents are the durable one and the
// one after each later write to it, and all combinations across sectors are
// legal. A change of size is metadata, which a file system journals in order:
// of several, a prefix survives; what was written past a size that did not
// survive is gone. This is the model of file systems that journal metadata
// only, with a disk that has a volatile write cache and powersafe overwrite
// (SQLite's term: a torn write never damages bytes outside of it).
//
// Crash states are told apart by a 64-bit hash of size and content. It is the
// same in every process, so a log can name a state by it. It isn't
// cryptographic.
package imagetest
