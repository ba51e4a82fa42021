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
//	nbd://HOST[:PORT]/EXPORT    an export of an NBD server; nbds:// with TLS
//	nbd+unix:///EXPORT?socket=PATH      the same on a unix socket; nbds+unix://
//	driver=DRIVER,KEY=VALUE,…   a stack, as in QEMU's --image-opts
//
// A location is a stack if it begins with "driver=" or contains ",driver=".
// Keys of a child node have "file." in front, as often as it takes; a comma
// inside a value is doubled. Drivers and their keys:
//
//	qcow2                  file; encrypt.format=luks (or aes, the legacy one)
//	                       if it is encrypted by itself, encrypt.key-secret;
//	                       backing, data-file: in place of the files that the
//	                       image names, which needn't be allowed then
//	luks                   file; key-secret: the name of the passphrase;
//	                       header: the image with the header, if it is
//	                       detached from the payload
//	raw                    file; offset, size: a window, in bytes or with one
//	                       of the suffixes k, M, G, T, each a multiple of 512
//	file, host_device      filename
//	nbd                    server.type=unix with server.path, or server.type=inet
//	                       with server.host, server.port; export; tls=on with
//	                       tls-certificates, tls-hostname, or tls-psk-file and
//	                       tls-username (see package nbd)
//	pebble                 dir; machine
//
// So driver=raw,offset=1G,size=64M,file.driver=qcow2,file.file.filename=vm.qcow2
// is a window into a qcow2 image, and
// driver=luks,key-secret=k,file.driver=qcow2,file.file.filename=vm.qcow2 a LUKS
// image, of either version, inside a qcow2 image. A location names a secret and
// never holds one. A child without driver= is a file. What isn't
// in this list is refused by name.
//
// # No guessing
//
// A guest can write any header it likes into a raw disk, so a format that is
// guessed from content is a format that the guest chose. A PATH without a
// format opens only if the file begins as files of ours do: with a store's
// header, or as a qcow2 image with the header extension that Create puts
// there. What an image names (a backing file, a data file) is opened only if
// Options.AllowExternal says so, and then as a path and nothing else.
package chain
