package qcow2_test

import (
	"context"
	"fmt"
	"log"

	"nvstore.dev/image/imagetest"
	"nvstore.dev/image/qcow2"
)

func Example() {
	file := imagetest.NewMemory(0) // usually a raw.Device
	im, err := qcow2.Create(file, &qcow2.CreateOptions{Size: 16 << 40})
	if err != nil {
		log.Fatal(err)
	}
	defer im.Close()
	if _, err := im.WriteAt([]byte("state one"), 16<<40-64<<20); err != nil {
		log.Fatal(err)
	}
	if err := im.Snapshots().Create("before"); err != nil {
		log.Fatal(err)
	}
	if _, err := im.WriteAt([]byte("state two"), 16<<40-64<<20); err != nil {
		log.Fatal(err)
	}
	if err := im.Snapshots().Revert("before"); err != nil {
		log.Fatal(err)
	}
	p := make([]byte, 9)
	if _, err := im.ReadAt(p, 16<<40-64<<20); err != nil {
		log.Fatal(err)
	}
	fmt.Println(string(p))
	// Output: state one
}

func ExampleImage_Check() {
	im, err := qcow2.Create(imagetest.NewMemory(0), nil)
	if err != nil {
		log.Fatal(err)
	}
	defer im.Close()
	r, err := im.Check(context.Background(), nil)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(r.Errors, "errors,", r.Leaks, "leaks")
	// Output: 0 errors, 0 leaks
}
