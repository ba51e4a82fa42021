// Package pebbledev keeps the devices of many machines in one Pebble folder.
//
// A Device is an image.Device whose medium is the folder: the same roots,
// nodes, chunks and commits that run on a disk image run on it unchanged. The
// content is cut into blocks of 4096 bytes, each the value of one key:
//
//	m/ <uuid: 16 bytes> /b/ <block number: u64, big endian>   4096 bytes
//	m/ <uuid: 16 bytes> /size                                 u64, big endian
//
// A block without a key reads as zeros, and no block lies at or past the size.
// The last block is stored whole, with zeros past the size. A file NVSTORE
// beside Pebble's own marks the folder as ours, so that the Pebble folder of
// another program is refused before anything in it is touched.
//
// # Durability
//
// Writes collect in memory, at most MaxPending bytes a device, and are then
// handed to Pebble without waiting for the medium. Sync commits the rest and
// waits for Pebble's log, once. Each block reaches the medium whole or not at
// all, and so does what one Sync commits.
//
// # Failure
//
// After the first failed write or sync of any file in the folder, nothing in
// it is changed any more, as if the power had gone at that instant, and every
// device of the folder is poisoned: Pebble itself would end the process. Close
// all and open again to go on.
package pebbledev
