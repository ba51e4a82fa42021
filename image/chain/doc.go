// Package chain opens an image by its location: it builds the stack of devices
// that a path, a Pebble folder or QEMU's notation names. It is the only
// package that imports all drivers.
//
// # Locations
//
//	PATH                        a raw or qcow2 image
//	pebble:DIR                  the only machine in a Pebble folder
//	pebble:DIR/MACHINE-UUID     one machine of many; pebble:DIR/ is the folder,
//	                            whatever DIR ends in
//	driver=DRIVER,KEY=VALUE,…   a stack, as in QEMU's --image-opts
//
// A location is a stack if it begins with "driver=" or contains ",driver=".
// Keys of a child node have "file." in front, as often as it takes; a comma
// inside a value is doubled. Drivers and their keys:
//
//	qcow2                  file
//	raw                    file; offset, size: a window, in bytes or with one
//	                       of the suffixes k, M, G, T, each a multiple of 512
//	file, host_device      filename
//	pebble                 dir; machine
//
// So driver=raw,offset=1G,size=64M,file.driver=qcow2,file.file.filename=vm.qcow2
// is a window into a qcow2 image. A child without driver= is a file. What isn't
// in this list is refused by name.
//
// # No guessing
//
// A guest can write any header it likes into a raw disk, so a format that is
// guessed from content is a format that the guest chose. A PATH without a
// format opens only if the file begins as files of ours do: with a store's
// header, or as a qcow2 image with the header extension that Create puts
// there. Nothing that is named inside an image is ever opened.
package chain
