// Package convert copies, compares, maps and measures images, as qemu-img's
// verbs do. It works on image.Device and its capabilities and knows no format:
// what a source says of its blocks (image.BlockStatuser) is what isn't read,
// and what a target can (image.ZeroWriter, CompressedWriter) is what isn't
// written.
//
// Work is cut into pieces of 1 MiB that begin at multiples of it, and several
// are in flight at a time. Memory is bounded by their number, whatever the
// size of the images.
//
// Nothing here makes files or gives them names; a target that wasn't converted
// to its end is the caller's to throw away.
package convert
