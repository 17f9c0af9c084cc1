package etcd3

import (
	"context"
	"fmt"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/apis/example"
	"k8s.io/apiserver/pkg/storage"
	"k8s.io/apiserver/pkg/storage/etcd3/testserver"
)

// TestLeaderKilled counts an object up to 300 while the leader is killed and started again. No
// acknowledged step is lost, and a watch sees every step once and in order.
func TestLeaderKilled(t *testing.T) {
	const last = 300
	ctx, store, client := testSetup(t)
	key := "/pods/ns/counter"
	made := &example.Pod{ObjectMeta: metav1.ObjectMeta{Name: "counter", Namespace: "ns"}}
	out := &example.Pod{}
	if err := store.Create(ctx, key, made, out, 0); err != nil {
		t.Fatal(err)
	}
	options := storage.ListOptions{ResourceVersion: out.ResourceVersion, Predicate: storage.Everything}
	watch, err := store.Watch(ctx, key, options)
	if err != nil {
		t.Fatal(err)
	}
	defer watch.Stop()
	for step := 1; step <= last; step++ {
		count(ctx, t, store, key, step)
		if step == last/3 {
			testserver.KillLeader(t, client)
		} else if step == 2*last/3 {
			testserver.StartKilled(t)
		}
	}
	for step := 1; step <= last; step++ {
		select {
		case event, open := <-watch.ResultChan():
			pod, is := event.Object.(*example.Pod)
			if !open || !is || pod.Annotations["step"] != fmt.Sprint(step) {
				t.Fatalf("instead of step %d the watch shows %v", step, event)
			}
		case <-time.After(time.Minute):
			t.Fatalf("the watch does not show step %d", step)
		}
	}
	if err := store.Get(ctx, key, storage.GetOptions{}, out); err != nil {
		t.Fatal(err)
	}
	if out.Annotations["step"] != fmt.Sprint(last) {
		t.Fatalf("the object has %v", out.Annotations)
	}
}

// count writes a step, again if it is not acknowledged. A step that is there already is not
// written again.
func count(ctx context.Context, t *testing.T, store *store, key string, step int) {
	update := storage.SimpleUpdate(func(found runtime.Object) (runtime.Object, error) {
		pod := found.(*example.Pod)
		before := pod.Annotations["step"]
		if step > 1 && before != fmt.Sprint(step-1) && before != fmt.Sprint(step) {
			t.Errorf("step %d is lost: the object has %v", step-1, before)
		}
		pod.Annotations = map[string]string{"step": fmt.Sprint(step)}
		return pod, nil
	})
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		tried, cancel := context.WithTimeout(ctx, 5*time.Second)
		err := store.GuaranteedUpdate(tried, key, &example.Pod{}, false, nil, update, nil)
		cancel()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("step %d: %v", step, err)
		}
	}
}
