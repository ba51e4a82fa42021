package imagetest_test

import (
	"fmt"

	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
)

// A counter that is one sector, written in place: is it safe?
func ExampleCrashDevice_CrashStates() {
	increment := func(d image.Device) error {
		p := make([]byte, 512)
		if err := image.ReadFull(d, p, 0); err != nil {
			return err
		}
		p[0]++
		if _, err := d.WriteAt(p, 0); err != nil {
			return err
		}
		return d.Sync()
	}

	d := imagetest.NewCrash(4096, nil)
	acked := []int{0} // log positions at which increments were acknowledged
	for range 3 {
		if err := increment(d); err != nil {
			fmt.Println(err)
		}
		acked = append(acked, d.Len())
	}

	states := 0
	for at := range d.Len() + 1 {
		least := 0 // acknowledged before the power was cut
		for least+1 < len(acked) && acked[least+1] <= at {
			least++
		}
		for state := range d.CrashStates(at, nil) {
			p := make([]byte, 1)
			_ = image.ReadFull(state.Open(), p, 0)
			if int(p[0]) < least {
				fmt.Println("lost:", state)
			}
			states++
		}
	}
	fmt.Println(states, "states, no acknowledged increment lost")
	// Output: 10 states, no acknowledged increment lost
}

// Each write and Sync of a workload fails in turn.
func ExampleEachFault() {
	for _, forever := range []bool{false, true} {
		runs := imagetest.EachFault(imagetest.Fault{Forever: forever}, func(x imagetest.Fault) int {
			d := imagetest.NewFault(imagetest.NewCrash(4096, nil), x)
			if _, err := d.WriteAt([]byte("state"), 0); err == nil {
				if d.Sync() == nil && d.Hits() > 0 {
					fmt.Println("an error went unnoticed at operation", x.At)
				}
			}
			return d.Hits()
		})
		fmt.Println(runs, "operations broken")
	}
	// Output:
	// 2 operations broken
	// 2 operations broken
}
